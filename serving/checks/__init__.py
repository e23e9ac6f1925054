"""Testing a version before it is used: what it adds, whom it changes, what gets worse."""
