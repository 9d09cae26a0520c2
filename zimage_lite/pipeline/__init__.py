"""The path of an image: prompt to pixels in three phases, each within the whole budget."""
