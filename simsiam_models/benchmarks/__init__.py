"""A backbone -> the numbers of the tables: one file per benchmark."""
