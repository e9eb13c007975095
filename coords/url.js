// What is chosen, as the part of the URL after #.
