"""The table of all that can be wrong with data: one short stable code for each, what it means, and its mend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reason:
    """`is_fatal` tells whether training refuses the row; what is not fatal trains, perhaps not as meant."""

    meaning: str
    mend: str
    is_fatal: bool = True


def _note(meaning: str, mend: str) -> Reason:
    return Reason(meaning=meaning, mend=mend, is_fatal=False)


def _fatal(meaning: str, mend: str) -> Reason:
    return Reason(meaning=meaning, mend=mend)


REASONS: dict[str, Reason] = {
    # files and rows
    "unusable_file": _fatal("the file cannot be read, is empty, or fits no format", "mend or remove the file"),
    "not_utf8": _fatal("bytes that are not UTF-8", "save the file as UTF-8"),
    "broken_json": _fatal("a row that is not JSON", "mend the row"),
    "equal_names": _fatal("one name twice in an object", "keep one of them"),
    "not_an_object": _fatal("a row that is no JSON object", "write one object a row"),
    "broken_row": _fatal("a row that cannot be read for another reason", "make the row again"),
    # fields
    "missing_field": _fatal("a field that is needed is not there", "add it, or mend its name"),
    "wrong_type": _fatal("a number, text, list or object where another belongs", "write the kind that is named"),
    "empty_text": _fatal("a text, message or list without content", "fill it in or remove the row"),
    "broken_unicode": _fatal("half of a surrogate pair in a text", "write the whole character"),
    "ignored_field": _note("a field that means nothing in this format", "remove it, or mend its name"),
    "other_training": _fatal(
        "a row for another kind of training, such as DPO, KTO or pretraining", "write a question and an answer"
    ),
    # turns and parts
    "unknown_role": _fatal("a role that does not exist", "write system, user or assistant as the format has them"),
    "unknown_part": _fatal("a part of a message that cannot stand there", "write text, image, or crop in an answer"),
    "no_user_turn": _fatal("a conversation in which nobody asks", "add the question"),
    "role_order": _note("turns that do not alternate, or a system turn that is not the first", "check their order"),
    "placeholder_count": _fatal("places of pictures that differ in number from the pictures", "write one for each"),
    "pictures_twice": _fatal("pictures named in two fields", "name each picture once"),
    "video": _fatal("a video or a sound in training data", "remove the row, or write its frames as pictures"),
    "spells_token": _note("text that spells a special token, which is read as text", "remove it if it was not meant"),
    "spells_placeholder": _note(
        "text that spells <image>, <img>, <video> or <audio>, which is read as text",
        "name the picture where the format has its place",
    ),
    # answers
    "no_target": _fatal("no assistant turn to train on", "add the answer, or use the row for R-GRPO"),
    "no_gold_answer": _fatal("no gold answer to judge rollouts by", 'add <answer>…</answer> or the field "answer"'),
    "gold_unreachable": _fatal(
        "a gold answer that no answer equals by the rules of the reward",
        "write the short answer alone, in at most 1,000 characters",
    ),
    "gold_missing": _fatal("a gold answer that is NaN in words", "write the answer, or remove the row"),
    "gold_slash": _note(
        "a gold answer with a slash between words, which is one answer", 'write ["cup", "mug"] where either is right'
    ),
    "gold_unlikely": _note(
        "a gold answer that reads like null, infinity, a list or an object",
        "write it as a model would say it, or remove it",
    ),
    "gold_mathematics": _note(
        "a gold answer in LaTeX or an expression, and math-verify is not installed: only the same writing is right",
        "pip install 'looktwice[math]'",
    ),
    "no_answer_block": _note("an answer without <answer>", "add <answer>…</answer>; R-GRPO and evaluation need it"),
    "answer_block": _fatal("an <answer> block that is empty or not closed", "write <answer>…</answer> with text in it"),
    "after_answer": _note("text or a call after </answer>", "put it before <answer>, or remove it"),
    "tool_text": _note(
        "tool text such as <tool_response> that is written by hand; in an answer it is trained",
        "remove it; a crop follows its call by itself",
    ),
    "think_not_closed": _note("<think> and </think> do not pair", "write each once, around the reasoning"),
    # crop calls and boxes
    "crop_command": _fatal("a crop command whose braces or brackets do not pair", "write {Crop name [x1, y1, x2, y2]}"),
    "call_not_closed": _fatal("a <tool_call> that is not closed", "add </tool_call>"),
    "call_without_box": _fatal("a call that does not hold one box in brackets", "write [x1, y1, x2, y2]"),
    "call_without_picture": _fatal("a call in a conversation without a picture", "add the picture or remove the call"),
    "no_such_picture": _fatal(
        "a call that names a picture which is not there, or not yet",
        "count pictures from 1, without crops",
    ),
    "no_call": _note(
        "four numbers in the wrapping of a call that is none in this format, so no crop follows",
        "write the call as the format has it",
    ),
    "call_text_changes": _note("a call that reads otherwise after tokenising", "write it in plain characters"),
    "box_wrong_length": _fatal("a box without exactly four numbers", "write [x1, y1, x2, y2]"),
    "box_not_a_number": _fatal("a box with something that is no finite number", "write four numbers"),
    "box_reversed": _fatal("a box that runs backwards or is empty", "write top-left, then bottom-right corner"),
    "box_outside": _fatal("the box of a call lies outside its picture", "mend the box, or give --box_frame"),
    "box_thin": _fatal("the box of a call is too thin to be cut", "make it wider"),
    "gold_box_outside": _fatal("a gold box lies outside its picture", "write it in original pixels"),
    "box_partly_outside": _note("a box reaches over its picture and is cut at the edge", "check boxes and their frame"),
    "box_whole_picture": _note("a crop that shows the whole picture again", "remove the call, or make its box smaller"),
    "box_rotated": _note(
        "a box fits the picture only before its EXIF rotation", "write boxes of the picture as viewers show it"
    ),
    "box_looks_unit": _note(
        "pixels or thousandths are declared, all four numbers are 1 or less", "give --box_frame unit"
    ),
    "box_looks_norm1000": _note(
        "pixels are declared, the numbers fit thousandths better", "give --box_frame norm1000 if they are"
    ),
    "box_looks_px": _note(
        "fractions or thousandths are declared, the numbers fit as pixels", "give --box_frame original_px"
    ),
    "unknown_frame": _fatal("a frame of boxes that does not exist", "write one of the four frames"),
    "mixed_frames": _fatal("boxes of one row in several frames", "write all in one frame"),
    # pictures
    "picture_missing": _fatal("no file at the path of a picture", "check the path and --image_base_path"),
    "picture_empty": _fatal("a picture file of 0 bytes", "replace the file"),
    "picture_other": _fatal("a file that is something else than a picture", "name the file of the picture"),
    "picture_damaged": _fatal("a picture that is cut short or damaged, or no file", "replace or remove it"),
    "picture_huge": _fatal("a picture of more than 178,956,970 pixels", "shrink it"),
    "picture_frames": _note(
        "several frames or pages, of which the first is used", "write the frame you mean as a file"
    ),
    "web_address": _fatal("a web address where a path belongs", "download the picture and write its path"),
    "data_url": _fatal("a data: URL or base64:// without a picture", "write data:image/png;base64,..."),
    # the set
    "too_long": _fatal(
        "more tokens than max_length", "raise --max_length, lower --max_pixels, or give --length_policy"
    ),
    "over_length": _note("more tokens than max_length, which --length_policy takes care of", "look how many they are"),
    "duplicate": _note("same pictures and same question as an earlier row", "keep one if it was not meant"),
    "leaked_question": _note("a question about a picture of the training set in the validation set", "remove it there"),
    "leaked_picture": _note("a picture of the training set in the validation set", "split by picture"),
}

BOX_REASONS = {
    "no_box": "call_without_box",
    "wrong_length": "box_wrong_length",
    "not_a_number": "box_not_a_number",
    "reversed": "box_reversed",
    "outside": "box_outside",
    "too_thin": "box_thin",
    "no_picture": "call_without_picture",
    "no_such_picture": "no_such_picture",
}
"""The code of each reason of a BoxError."""
