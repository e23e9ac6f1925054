"""HTTP endpoints of Moerge's own, one file for each noun."""
