"""The paper's tables: the runs behind them, and how they are read; it imports configs, training, shapes and what is below them."""
