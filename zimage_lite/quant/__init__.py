"""How weights are stored: the table of formats and a codec per family. Arithmetic alone: knows no files."""
