"""What training starts from: importances of units by Fisher information, and the routers and masks made of them."""
