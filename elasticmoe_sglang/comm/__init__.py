"""How ranks exchange data: the collective region, the process groups over it, the commit barrier."""
