"""The commands of ``nystrom convert``: each module here registers one."""
