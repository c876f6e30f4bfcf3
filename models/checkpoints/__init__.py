"""Published weights: files as others write them, and their names mapped onto ours."""
