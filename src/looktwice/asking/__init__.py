"""A question on its way: what is asked, what is told while the answer is written, the answer, files of questions."""
