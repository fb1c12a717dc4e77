"""Warm start: importances of units by Fisher information, and initial routers, masks and widths from them."""
