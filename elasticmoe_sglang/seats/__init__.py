"""Seats: membership, process group, commit gate."""
