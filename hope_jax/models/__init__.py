"""Language models and what is done with them."""
