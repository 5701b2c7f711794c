//! Thin system calls that rustix lacks or spells differently (owner: block helper).
