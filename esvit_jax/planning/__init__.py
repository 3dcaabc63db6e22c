"""What a run needs on chips that are not here, by compiling its training step for them.

`plan.plan` is the public function.
"""
