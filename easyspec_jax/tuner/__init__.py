"""Partitions of a draft's layers that fit the model, found on texts of the base's own."""
