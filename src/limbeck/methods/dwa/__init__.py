"""Directed weight adjustment, and recovery from batch statistics (SRe2L), its base."""
