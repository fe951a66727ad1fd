"""Reading and writing data files: containers of rows, and the formats in which rows hold samples."""
