"""Distribution backtracking."""
