/* The law of a slot as lmpipe/lifecycle.py has it; tests/model/test_model.py compares the two, line by line. */

/* SlotState */
#define FREE      0
#define LEASED    1
#define WRITING   2
#define READY     3
#define COMMITTED 4
#define DOOMED    5

/* The state word: both change in one step. */
byte state = FREE;
byte gen = 1;

/* SlotEvent, Actor */
mtype = { LEASE, OPEN, CLOSE, COMMIT, DOOM, FREE_IT };
mtype = { OWNER, WRITER };

#define NOT_LEGAL 255
#define ANY       255

#ifdef WITHOUT_GENERATION
#define SAME_LIFE(g) true
#else
#define SAME_LIFE(g) (gen == (g))
#endif

/* TRANSITIONS */
inline next_state(event, after) {
    if
    :: state == FREE      && event == LEASE   -> after = LEASED
    :: state == LEASED    && event == OPEN    -> after = WRITING
    :: state == WRITING   && event == CLOSE   -> after = READY
    :: state == READY     && event == COMMIT  -> after = COMMITTED
    :: state == COMMITTED && event == DOOM    -> after = DOOMED
    :: state == DOOMED    && event == FREE_IT -> after = FREE
    :: state == LEASED    && event == FREE_IT -> after = FREE
    :: state == WRITING   && event == FREE_IT -> after = FREE
    :: state == READY     && event == FREE_IT -> after = FREE
    :: else -> after = NOT_LEGAL
    fi
}

/* ACTORS */
inline check_actor(actor, event) {
    if
    :: event == LEASE   -> assert(actor == OWNER)
    :: event == OPEN    -> assert(actor == WRITER)
    :: event == CLOSE   -> assert(actor == WRITER)
    :: event == COMMIT  -> assert(actor == OWNER)
    :: event == DOOM    -> assert(actor == OWNER)
    :: event == FREE_IT -> assert(actor == OWNER)
    fi
}

/* SlotTable._fire: load, look, compare and swap, and again when somebody else was quicker. It ends with a swap that took
 * effect on exactly the word it looked at, or with a word in which the event is not legal: one step. `only`: the one
 * state in which it is wanted (take_back), or ANY. */
inline fire(actor, event, of_gen, only, done) {
    d_step {
        check_actor(actor, event);
        next_state(event, after);
        done = (SAME_LIFE(of_gen) && after != NOT_LEGAL && (only == ANY || state == only));
        if
        :: done -> state = after; if :: event == FREE_IT -> gen++ :: else fi
        :: else
        fi;
        after = 0
    }
}
