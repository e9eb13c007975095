// The data and the picture as files.
