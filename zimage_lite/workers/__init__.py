"""Who draws: a pipeline behind one call that takes an order and hands over files; in this process or, by Ray, in
others, one on each GPU."""
