"""One model on several processes: its parts, who tells whom what, a worker's life."""
