"""Mirage: graphs condensed to frequent sets of computation trees."""
