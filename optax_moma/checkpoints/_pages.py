"""Memory that is freed and needed again, leaf after leaf, kept by the process in between.

The C library gives large arrays back to the system when they are freed, and the system clears every
page that it hands out: a good share of the processors' time in a merge that reads gigabytes through
buffers of megabytes. A program that merges and then ends may keep its pages instead.
"""

import ctypes

# The numbers of glibc's options (malloc.h), and what each is set to.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1
_OPTIONS = {
    _M_MMAP_THRESHOLD: _LARGEST,  # arrays below 2 GiB come from the heap,
    _M_TRIM_THRESHOLD: _LARGEST,  # whose end is kept,
    _M_ARENA_MAX: 1,  # and what one thread frees serves the others.
}


def keep_pages() -> bool:
    """Has this process keep the pages of freed arrays, from now on, for arrays to come.

    For programs, not for libraries: it changes the allocator of everything in the process, which
    then gives no memory back before it ends. Arrays of 2 GiB and more are given back as before.

    Returns:
      Whether the C library knows how: glibc does.

    Example:
      >>> keep_pages() in (True, False)
      True

    Source: glibc's manual, "Malloc Tunable Parameters".
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system, Windows
        return False
    return all(set_option(option, value) for option, value in _OPTIONS.items())
