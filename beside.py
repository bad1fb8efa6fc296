"""Three claims about systems that are named beside Kimi K2.5, with its tower and decoder at toy scale.

    pixels             DeepSeek-OCR: a page that holds r letters per vision token ─▶ tower ─▶ the decoder writes them out, r = 1 … 20
    reading_order      DeepSeek-OCR 2: tiles ─▶ tower ─▶ [causal queries ─▶] decoder, which writes the tiles' letters by their numbers
    block_attention    MoBA: records … keys ─▶ decoder whose queries see their own block and the k earlier blocks of largest affinity

Causal queries (DeepEncoder V2): behind the vision tokens stand as many learned queries; in some more layers they see all vision tokens
and the queries before them, and what becomes of them is all that the decoder gets. Block attention (MoBA): the affinity of a query and a
block is q · mean of the block's keys, for each head its own; no gradient goes through the choice.

Public names: Page, CausalQueries, order_mask, chosen_blocks, cost_of_blocks, cost_of_window, equal_window, BlockMLA, WindowMLA,
pixels, reading_order, block_attention.     Tests: pytest tests/test_beside.py
"""
