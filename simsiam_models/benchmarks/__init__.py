"""A backbone -> the numbers of the tables: one file per benchmark."""
SIZE, LEAST = 224, 8  # pixels: of the published protocols, and the fewest
