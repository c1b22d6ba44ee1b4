"""Linear classification on a frozen backbone."""
