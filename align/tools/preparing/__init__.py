"""What `align.prepare` needs beside the steps: models that score rows, the folder of a set, other engines."""
