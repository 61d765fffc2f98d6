"""Looking at data before it trains anything: faults, figures, balance, and the rows as the model will see them."""
