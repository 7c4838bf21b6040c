"""One study shared by several workers, on one host or many."""
