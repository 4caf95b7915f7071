"""The template of model cards, and the cards of what was published."""
