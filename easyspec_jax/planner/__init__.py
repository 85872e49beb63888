"""What a pair would cost on given devices, and which way to run it is best; nothing is loaded."""
