"""What people look at: pages, and tables and samples in the terminal."""
