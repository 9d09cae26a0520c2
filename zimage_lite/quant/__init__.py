"""How weights are stored: the table of formats, a codec per family, recipes, and the streaming converter."""
