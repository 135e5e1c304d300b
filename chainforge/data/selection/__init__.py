"""Decide which scored samples are worth training on, and write them as a data set."""
