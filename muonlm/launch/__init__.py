"""Starting runs elsewhere: what a job is, the scripts that it becomes, and handing them to who runs them."""
