"""What features say about a data set: nearest images, copies, outliers, likely wrong labels."""
