/* One slot, its owner (gather), writers that lease it, readers that hold it; any of them dies between any two steps, or
 * pauses for as long as it likes. shm/slots.py, shm/table.py, shm/hold.py, native/holds.cpp.
 *
 * Memory is weaker than the order of the program: a reader's hold and the owner's doom wait in a buffer until `memory`
 * lets them out, the writer's streaming stores too, those in any order. Fences wait for the buffer.
 *
 * WITHOUT_... leaves out one step of the protocol; spin then finds a run that breaks it (check_models.py does them all).
 */
#include "law.pml"

/* How much is looked at: -D on spin's command line says otherwise. */
#ifndef WRITERS
#define WRITERS 2       /* at most 2 */
#endif
#ifndef READERS
#define READERS 1       /* at most 2 */
#endif
#ifndef LIVES
#define LIVES 2         /* of the slot */
#endif
#ifndef READS
#define READS 1         /* by each reader; a read may miss */
#endif
#ifndef LEASES
#define LEASES 1        /* taken by each writer, a stale one too */
#endif

#ifndef OWNER_KILLS
#define OWNER_KILLS 1
#endif

#define NOBODY 7
#define EMPTY 255

byte lent_to = NOBODY;              /* the slot header's owner word */
byte half[2];                       /* the payload, in two words: the generation that wrote each */
byte stream[4] = EMPTY;             /* the writers' streaming stores that are on their way, two each */
bool doom_buffered;                 /* the owner's store of DOOMED is on its way */
byte hold[2];                       /* each reader's hold word: a generation, 0 is none */
byte buffered[2] = EMPTY;        /* its store that is on its way */
bool listed[2];                     /* its session's file is there */

byte offered[2];              /* Credit: the generation lent last; the message may be read late, and twice */
byte returned[2];             /* Release: the generation given back unused */

bool writer_lives[2] = true;  /* the session's lock */
bool reader_lives[2] = true;
byte ended;                         /* writers and readers that are done or dead */

bool kill_owner;
bool kill_writer[2];
bool kill_reader[2];

/* What only the checks look at. */
byte writing[2];              /* the generation that a living writer may store to; 0: none */
byte reading[2];              /* the generation that a reader trusts; 0: none */

#define may_store(w)  (writing[w] != 0 && writer_lives[w])
#define is_read(g)    ((reading[0] == (g) && reader_lives[0]) || (reading[1] == (g) && reader_lives[1]))

active proctype memory() {
    do
    :: atomic { doom_buffered -> assert(state == COMMITTED); state = DOOMED; doom_buffered = false }
    :: atomic { buffered[0] != EMPTY -> hold[0] = buffered[0]; buffered[0] = EMPTY }
    :: atomic { buffered[1] != EMPTY -> hold[1] = buffered[1]; buffered[1] = EMPTY }
    :: atomic { stream[0] != EMPTY -> half[0] = stream[0]; stream[0] = EMPTY }
    :: atomic { stream[1] != EMPTY -> half[1] = stream[1]; stream[1] = EMPTY }
    :: atomic { stream[2] != EMPTY -> half[0] = stream[2]; stream[2] = EMPTY }
    :: atomic { stream[3] != EMPTY -> half[1] = stream[3]; stream[3] = EMPTY }
    :: ended == WRITERS + READERS && timeout -> break
    od
}

/* SIGKILL of a writer, of a reader, and of the owner, which comes back and may be killed in its recovery too. */
active proctype killer() {
    byte owner_kills;
    do
    :: atomic { owner_kills < OWNER_KILLS && !kill_owner -> kill_owner = true; owner_kills++ }
    :: !kill_writer[0] -> kill_writer[0] = true
    :: !kill_reader[0] -> kill_reader[0] = true
    :: ended == WRITERS + READERS -> break
    od
}

/* HoldScanner.held: fence, list the directory, then read the table of every living session. */
#define list()      seen[0] = listed[0]; seen[1] = listed[1]
#define is_held(r)  (seen[r] && reader_lives[r] && hold[r] == gen)

inline scan() {
#ifndef WITHOUT_OWNERS_FENCE
    !doom_buffered;
#endif
#ifndef WITHOUT_NEW_LISTING
    d_step { list() };
#endif
    held = is_held(0);
#if READERS > 1
    held = held || is_held(1);
#endif
#ifdef WITHOUT_SCAN
    held = false;
#endif
    d_step { seen[0] = false; seen[1] = false }
}

/* No slot is freed that somebody reads or may write. */
inline free_it(only) {
    atomic {
        !doom_buffered;     /* a swap of a word goes behind the store to it before */
        fire(OWNER, FREE_IT, gen, only, ok);
        if
        :: ok ->
            assert(!is_read(gen - 1));
            assert(!may_store(0) || writing[0] != gen - 1);
            assert(!may_store(1) || writing[1] != gen - 1)
        :: else
        fi;
        ok = false
    }
}

inline free_unless_held() {
    if
    :: held -> held = false
    :: else -> free_it(ANY)
    fi
}

#define is_lent (state == LEASED || state == WRITING || state == READY)

active proctype owner() {
    byte after;
    bool ok, held, seen[2];
again:
    {
        do
        :: atomic { state == FREE && gen <= LIVES -> if :: lent_to = 0 :: WRITERS > 1 -> lent_to = 1 fi };
            /* The header first, the state word last. */
            atomic { fire(OWNER, LEASE, gen, ANY, ok); assert(ok); ok = false };
            offered[lent_to] = gen
        :: atomic { state == READY -> fire(OWNER, COMMIT, gen, ANY, ok); ok = false }
        :: state == LEASED -> free_it(LEASED)                   /* take_back */
        :: is_lent && returned[lent_to] == gen -> free_it(ANY)  /* the writer gave it back */
#ifdef WITHOUT_LIFE_CHECK
        :: is_lent -> free_it(ANY)                              /* "it has taken too long" */
#else
        :: is_lent && !writer_lives[lent_to] -> free_it(ANY)    /* bury */
#endif
#ifdef WITHOUT_NEW_LISTING
        :: atomic { state == COMMITTED && !doom_buffered -> list() };
            doom_buffered = true; scan(); free_unless_held()
#else
#ifdef WITHOUT_DOOM_FIRST
        :: state == COMMITTED && !doom_buffered ->
            scan(); doom_buffered = true; free_unless_held()
#else
        :: atomic { state == COMMITTED && !doom_buffered -> doom_buffered = true };
            scan(); free_unless_held()
#endif
#endif
        :: state == DOOMED -> scan(); free_unless_held()        /* sweep */
        :: ended == WRITERS + READERS -> break
        od;
        goto over
    } unless { kill_owner };
    atomic { !doom_buffered -> held = false; ok = false; after = 0; seen[0] = false; seen[1] = false };
    kill_owner = false;
    {
        if                          /* SlotOwner.recover, for one slot */
        :: atomic { state == READY -> fire(OWNER, COMMIT, gen, ANY, ok); ok = false }
        :: (state == LEASED || state == WRITING) && !writer_lives[lent_to] -> free_it(ANY)
        :: state == DOOMED ->
#ifndef WITHOUT_HOLDS_IN_RECOVERY
            scan();
#endif
            free_unless_held()
        :: else
        fi
    } unless { kill_owner };
    goto again;
over:
    /* All others are gone: whatever they held comes back. */
    atomic {
        !doom_buffered && buffered[0] == EMPTY && buffered[1] == EMPTY;
        if
        :: state == READY -> fire(OWNER, COMMIT, gen, ANY, ok)
        :: state == LEASED || state == WRITING -> assert(!writer_lives[lent_to]); free_it(ANY)
        :: else
        fi;
        if :: state == COMMITTED -> fire(OWNER, DOOM, gen, ANY, ok) :: else fi;
        if :: state == DOOMED -> scan(); assert(!held); free_it(ANY) :: else fi;
        assert(state == FREE)
    }
}

proctype writer(byte me) {
    byte mine, tries, after;
    bool ok;
    {
        do
        :: atomic { tries < LEASES && offered[me] != 0 -> tries++; mine = offered[me] };
#ifndef WITHOUT_MEMORY_OF_RETURNS
            if :: returned[me] == mine -> goto idle :: else fi; /* it was told of it again before the owner heard */
#endif
            if
            :: atomic { returned[me] = mine; goto idle }        /* given back before it was opened */
            :: atomic {
                fire(WRITER, OPEN, mine, ANY, ok);
                if
                :: ok -> assert(!may_store(1 - me)); writing[me] = mine; ok = false
                :: else -> goto idle
                fi }
            fi;
            stream[2 * me] = mine;
            stream[2 * me + 1] = mine;
            if
            :: skip
            :: atomic {                                         /* it failed, says so and touches nothing more */
                stream[2 * me] == EMPTY && stream[2 * me + 1] == EMPTY ->
                writing[me] = 0; returned[me] = mine; goto idle }
            fi;
#ifndef WITHOUT_STORE_FENCE
            stream[2 * me] == EMPTY && stream[2 * me + 1] == EMPTY;
#endif
            atomic { fire(WRITER, CLOSE, mine, ANY, ok); assert(ok); ok = false; writing[me] = 0 };
idle:       mine = 0
        :: break
        od
    } unless { kill_writer[me] };
    /* A process dies with its stores done. */
    atomic {
        stream[2 * me] == EMPTY && stream[2 * me + 1] == EMPTY ->
        writer_lives[me] = false; writing[me] = 0; mine = 0; tries = 0; ended++
    }
}

proctype reader(byte me) {
    byte wanted, tries;
    {
        listed[me] = true;
        do
        :: atomic { tries < READS ->
            tries++;
            if :: wanted = 1 :: wanted = 2 :: LIVES > 2 -> wanted = 3 fi;   /* a row of the index, of any age */
            buffered[me] = wanted };
#ifndef WITHOUT_READERS_FENCE
            buffered[me] == EMPTY;
#endif
#ifndef WITHOUT_REREAD
            atomic { if :: state == COMMITTED && gen == wanted -> reading[me] = wanted :: else -> goto let_go fi };
#else
            reading[me] = wanted;
#endif
            assert(half[0] == wanted);
            assert(half[1] == wanted);
let_go:     atomic { buffered[me] == EMPTY -> reading[me] = 0; buffered[me] = 0; wanted = 0 };
            buffered[me] == EMPTY
        :: tries == READS -> break
        od
    } unless { kill_reader[me] };
    atomic { buffered[me] == EMPTY -> reader_lives[me] = false; reading[me] = 0; wanted = 0; tries = 0; ended++ }
}

init {
    atomic {
        run writer(0);
        if :: WRITERS > 1 -> run writer(1) :: else fi;
        run reader(0);
        if :: READERS > 1 -> run reader(1) :: else fi
    }
}
