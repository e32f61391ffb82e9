"""Ranks: membership, process group, commit barrier."""
