/* Counts how often each thread takes CPython's GIL, exactly, and how long it waits for it and holds it.
 *
 * Loaded before libc (LD_PRELOAD), in place of its pthread_mutex_lock and pthread_mutex_unlock. CPython's take_gil and
 * drop_gil each lock the GIL's own mutex once and unlock it once (a wait in between happens inside libc and passes
 * nothing here), so a thread that does not have the GIL and locks that mutex takes it, and one that has it lets it go.
 * Which mutex it is shows by itself: `gil_find`, called through ctypes, which lets go of the GIL for the call, marks the
 * thread, and the next mutex that it locks is that of the GIL which it takes back.
 *
 * Works for CPython 3.11 to 3.14 on Linux, except for the free-threaded build. `gil_watch` is for 3.11 alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define THREADS_MAX 4096
#define PLACES_MAX 8192
#define DEPTH 4
#define PER_THREAD __thread __attribute__((tls_model("initial-exec")))

struct thread {
    int64_t id, taken, wait_ns_max, hold_ns_max;
    int64_t work_ns_max; /* processor time of a hold: what else the machine does is not in it */
};

/* Where the GIL was let go: the innermost frames. Laid out as `bench.gil.Place`, as the figures are as `bench.gil.Thread`. */
struct place {
    void *code[DEPTH];
    int32_t line[DEPTH];
    int64_t thread_id;
    int64_t count, work_ns_max;
};

static struct thread threads[THREADS_MAX];
static atomic_int thread_count;
static struct place places[PLACES_MAX]; /* guarded by the GIL */
static int place_count;
static atomic_int is_watching;

static pthread_mutex_t *_Atomic gil;
static int (*real_lock)(pthread_mutex_t *), (*real_unlock)(pthread_mutex_t *);

static PER_THREAD enum { WITHOUT, TAKING, HOLDING, DROPPING } state;
static PER_THREAD int64_t since_ns, work_since_ns;
static PER_THREAD struct thread *mine;
static PER_THREAD int is_marked;
static PER_THREAD int64_t *record, recorded, record_room;

static void *(*swap_state)(void *), *(*this_state)(void), *(*frame_of)(void *), *(*code_of)(void *), *(*back_of)(void *);
static int (*line_of)(void *);
static void (*decref)(void *);

static void *found(void *handle, const char *name)
{
    void *symbol = dlsym(handle, name);
    if (!symbol) {
        fprintf(stderr, "bench/gil.c: there is no %s in this process\n", name);
        abort();
    }
    return symbol;
}

static int64_t now_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void keep_max(int64_t *max, int64_t value)
{
    if (value > *max)
        *max = value;
}

/* Called by a thread that has the GIL and is about to let it go. Its interpreter's state is no longer set then, which
 * objects cannot be made without. */
static void note_place(int64_t work_ns)
{
    void *own = this_state();
    if (!own) /* a thread that is ending */
        return;
    void *before = swap_state(own);
    struct place place = {.thread_id = mine->id};
    void *frame = frame_of(own);
    for (int i = 0; i < DEPTH && frame; i++) {
        place.code[i] = code_of(frame); /* and keep it: its address must stay its own */
        place.line[i] = line_of(frame);
        void *back = back_of(frame);
        decref(frame);
        frame = back;
    }
    if (frame)
        decref(frame);
    swap_state(before);
    int i = 0;
    while (i < place_count && memcmp(&places[i], &place, offsetof(struct place, count)))
        i++;
    if (i == PLACES_MAX)
        return;
    if (i == place_count)
        places[place_count++] = place;
    places[i].count++;
    keep_max(&places[i].work_ns_max, work_ns);
}

static void begin(void)
{
    if (!mine) {
        int number = atomic_fetch_add(&thread_count, 1);
        if (number >= THREADS_MAX) {
            fprintf(stderr, "bench/gil.c: more than %d threads\n", THREADS_MAX);
            abort();
        }
        mine = &threads[number];
        mine->id = syscall(SYS_gettid);
    }
    if (state == HOLDING) {
        int64_t work_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - work_since_ns;
        keep_max(&mine->hold_ns_max, now_ns(CLOCK_MONOTONIC) - since_ns);
        keep_max(&mine->work_ns_max, work_ns);
        state = DROPPING;
        if (is_watching)
            note_place(work_ns);
    } else {
        state = TAKING;
        since_ns = now_ns(CLOCK_MONOTONIC);
    }
}

static void end(void)
{
    if (state == DROPPING) {
        state = WITHOUT;
    } else if (state == TAKING) {
        int64_t now = now_ns(CLOCK_MONOTONIC);
        mine->taken++;
        keep_max(&mine->wait_ns_max, now - since_ns);
        if (recorded < record_room)
            record[recorded++] = now - since_ns;
        since_ns = now;
        work_since_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
        state = HOLDING;
    }
}

int pthread_mutex_lock(pthread_mutex_t *mutex)
{
    if (!real_lock)
        real_lock = found(RTLD_NEXT, "pthread_mutex_lock");
    if (is_marked) {
        is_marked = 0;
        gil = mutex;
    }
    if (mutex == gil)
        begin();
    return real_lock(mutex);
}

int pthread_mutex_unlock(pthread_mutex_t *mutex)
{
    if (!real_unlock)
        real_unlock = found(RTLD_NEXT, "pthread_mutex_unlock");
    if (mutex == gil)
        end();
    return real_unlock(mutex);
}

/* To be called while there is no other thread. */
void gil_find(void) { is_marked = 1; }

void gil_nothing(void) {}

/* Copies the figures of all threads that ever took the GIL; returns how many there are. */
int32_t gil_threads(struct thread *out)
{
    int32_t count = thread_count;
    memcpy(out, threads, count * sizeof *out);
    return count;
}

/* From now on note how long this thread waits for the GIL each time, in nanoseconds, as long as there is room. */
void gil_record(int64_t *out, int64_t room)
{
    record = out;
    record_room = room;
    recorded = 0;
}

/* Note it no more; returns how often that was. */
int64_t gil_recorded(void)
{
    record_room = 0;
    return recorded;
}

/* Longest times begin anew. */
void gil_forget_longest(void)
{
    for (int i = 0; i < thread_count; i++)
        threads[i].wait_ns_max = threads[i].hold_ns_max = threads[i].work_ns_max = 0;
}

/* Forget the places, and note where the GIL is let go, from now on or no more. The garbage collector must be off meanwhile. */
void gil_watch(int32_t wanted)
{
    swap_state = found(RTLD_DEFAULT, "PyThreadState_Swap");
    this_state = found(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
    frame_of = found(RTLD_DEFAULT, "PyThreadState_GetFrame");
    code_of = found(RTLD_DEFAULT, "PyFrame_GetCode");
    back_of = found(RTLD_DEFAULT, "PyFrame_GetBack");
    line_of = found(RTLD_DEFAULT, "PyFrame_GetLineNumber");
    decref = found(RTLD_DEFAULT, "Py_DecRef");
    place_count = 0;
    is_watching = wanted;
}

/* Copies the places; returns how many there are. */
int32_t gil_places(struct place *out)
{
    memcpy(out, places, place_count * sizeof *out);
    return place_count;
}
