"""The cluster: Ray sessions, and what a run needs of its machines."""
