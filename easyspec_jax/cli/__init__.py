"""The command line, `easyspec COMMAND`: a file for each command, and what several of them share."""
