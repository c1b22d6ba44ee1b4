"""Pages that open from disk: one HTML file each, without anything from elsewhere."""
