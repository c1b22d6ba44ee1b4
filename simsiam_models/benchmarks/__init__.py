"""A backbone -> the numbers of the tables: one folder per benchmark."""
