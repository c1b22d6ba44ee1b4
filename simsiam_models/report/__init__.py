"""The report of a run or of results as a page: what reads a run's files, and a module for each section."""
