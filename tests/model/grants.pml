/* Mapped pages: the engine grants gather a look at them for one save, and takes them back whenever it likes; gather copies
 * them into a slot meanwhile. producer/saving.py, shm/hold.py (Grant, granted), stages/gather/saves.py.
 *
 * The engine reuses its pages as soon as it has revoked, uses its one grant word again for the next save, is killed and
 * comes back as another session that counts its saves from 1 again. Messages wait in the socket as long as they like.
 * gather pauses, or is killed and recovers, between any two steps.
 *
 * The store that revokes waits in a buffer until `memory` lets it out, later ones may overtake it; a fence waits for it.
 * WITHOUT_... leaves out one step of the protocol; spin then finds a run that breaks it (check_models.py does them all).
 */
#include "law.pml"

#ifndef PROMPTS
#define PROMPTS 3           /* that each session has one after the other in the same pages */
#endif
#define SESSIONS 2

byte session;               /* the engine's present one: 0, then 1 */
byte grant[SESSIONS];       /* the grant word of each session's table: a save's id, or 0 */
bool revoking;              /* the engine's store of 0 is on its way */
byte page[4];               /* two halves for each session: the prompt whose KV they hold */

chan saves = [2] of { byte, byte, byte };   /* session, save id, prompt */
bool answered[SESSIONS];    /* gather has answered the session's last save */

byte half[2];               /* the slot's payload */
byte named;                 /* the slot's record: the prompt */

bool kill_gather;
bool kill_engine;
bool engine_over;

/* Prompts of the two sessions are all different, their save ids are the same. */
#define prompt_of(s, n) ((s) * PROMPTS + (n))

active proctype memory() {
    do
    :: atomic { revoking -> grant[session] = 0; revoking = false }
    :: engine_over -> break
    od
}

active proctype killer() {
    do
    :: !kill_gather -> kill_gather = true
    :: atomic { !kill_engine && session == 0 -> kill_engine = true }
    :: engine_over -> break
    od
}

active proctype engine() {
    byte n;
again:
    {
        do
        :: n < PROMPTS ->
            n++;
            page[2 * session] = prompt_of(session, n);
            page[2 * session + 1] = prompt_of(session, n);
            answered[session] = false;
            atomic { !revoking -> grant[session] = n };
            if
            :: nfull(saves) -> saves!session, n, prompt_of(session, n)
            :: skip                                     /* gather is busy: dropped */
            fi;
            if
            :: answered[session]
            :: skip                                     /* a deadline, a preemption, an abort */
            fi;
            revoking = true;                            /* Grant.release, and the pages are used again */
#ifndef WITHOUT_REVOKES_FENCE
            !revoking;
#endif
        :: n == PROMPTS -> break
        od
    } unless { kill_engine };
    !revoking;
    if
    :: atomic { kill_engine && session == 0 -> session = 1; kill_engine = false; n = 0; goto again }
    :: else
    fi;
    engine_over = true
}

#ifdef WITHOUT_SAVE_ID
#define granted (grant[who] != 0)
#else
#define granted (grant[who] == id)
#endif

#define assert_whole() assert(half[0] == named && half[1] == named)

active proctype gather() {
    byte who, id, prompt, after;
    bool ok;
again:
    {
        do
        :: atomic { state == COMMITTED -> fire(OWNER, DOOM, gen, ANY, ok); fire(OWNER, FREE_IT, gen, ANY, ok); gen = 1 }
        :: atomic { saves?who, id, prompt; ok = false };
#ifdef WITHOUT_SESSION
            who = session;
#endif
            if
            :: who != session -> goto done               /* not registered; or its pages are mapped still */
            :: skip
            fi;
            if :: granted :: else -> goto done fi;
            atomic {
                if :: state == FREE :: else -> goto done fi;
                fire(OWNER, LEASE, gen, ANY, ok);
                fire(WRITER, OPEN, gen, ANY, ok)
            };
            half[0] = page[2 * who];
            half[1] = page[2 * who + 1];
#ifdef WITHOUT_LOOK_BEFORE_CLOSE
            named = prompt;
            fire(WRITER, CLOSE, gen, ANY, ok);
#endif
#ifndef WITHOUT_LOOK_AFTER_COPY
            if
            :: granted
            :: else -> atomic { fire(OWNER, FREE_IT, gen, ANY, ok); gen = 1; goto done }
            fi;
#endif
#ifndef WITHOUT_LOOK_BEFORE_CLOSE
            named = prompt;
            fire(WRITER, CLOSE, gen, ANY, ok);
#endif
            atomic { fire(OWNER, COMMIT, gen, ANY, ok); assert(ok); assert_whole() };
done:       atomic { answered[who] = true; who = 0; id = 0; prompt = 0; ok = false }
        :: engine_over && empty(saves) -> break
        od;
        goto over
    } unless { kill_gather };
    /* Its successor. Whatever the dead one was writing itself comes back, what was closed is kept. */
    atomic {
        kill_gather = false; who = 0; id = 0; prompt = 0; ok = false; after = 0;
        if
        :: state == READY -> fire(OWNER, COMMIT, gen, ANY, ok); assert_whole()
        :: state == LEASED || state == WRITING -> fire(OWNER, FREE_IT, gen, ANY, ok); gen = 1
        :: else
        fi;
        ok = false
    };
    goto again;
over:
    assert(state == FREE || state == COMMITTED)
}
