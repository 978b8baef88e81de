"""What is asked of stores: requests, how many at a time, and the manners of warming beside jobs."""
