"Images, and the tasks that are made of them."
