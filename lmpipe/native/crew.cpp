#include "crew.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "levels.h"

namespace lmpipe {
namespace {

void work(Job &job) {
    for (;;) {
        const uint64_t index = job.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= job.pieces) break;
        job.piece(index);
    }
    // Streaming stores are ordered by nothing but this: without it the "done" below, or the caller's commit after it,
    // could be seen before the bytes.
    kernels().store_fence();
}

}  // namespace

struct Crew::Helpers {
    std::mutex turn;  // one job at a time
    std::mutex lock;  // guards what follows
    std::condition_variable wake, idle;
    Job *job = nullptr;
    uint64_t jobs_begun = 0;
    unsigned working = 0;
    bool stop = false;
    std::vector<std::thread> threads;

    void start(unsigned count) {
        if (!threads.empty()) return;
        // Signals are for the interpreter's threads.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            while (threads.size() < count) threads.emplace_back([this] { help(); });
        } catch (const std::system_error &) {
            // No more threads to be had: the caller works alone, or with those that came.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void help() {
#ifdef __linux__
        pthread_setname_np(pthread_self(), "lmpipe-copy");
#endif
        std::unique_lock held(lock);
        for (uint64_t seen = 0;;) {
            wake.wait(held, [&] { return stop || (job && seen != jobs_begun); });
            if (stop) return;
            seen = jobs_begun;
            Job &current = *job;
            working++;
            held.unlock();
            work(current);
            held.lock();
            if (--working == 0) idle.notify_all();
        }
    }
};

Crew::~Crew() {
    if (!helpers_ || pid_ != getpid()) return;  // after a fork there is nobody to stop, and no lock to trust
    {
        std::lock_guard held(helpers_->lock);
        helpers_->stop = true;
    }
    helpers_->wake.notify_all();
    for (std::thread &thread : helpers_->threads) thread.join();
    delete helpers_;
}

void Crew::notice_fork() {
    if (threads_ < 2) return;
    const pid_t pid = getpid();
    if (helpers_ && pid == pid_) return;
    helpers_ = new Helpers;  // the parent's, if there were any, are leaked: their locks may be held for ever
    pid_ = pid;
}

void Crew::run(Job &job) {
    if (threads_ < 2 || job.pieces < 2) {
        work(job);
        return;
    }
    Helpers &h = *helpers_;
    std::lock_guard turn(h.turn);
    h.start(threads_ - 1);
    {
        std::lock_guard held(h.lock);
        h.job = &job;
        h.jobs_begun++;
    }
    h.wake.notify_all();
    work(job);
    // A helper that has not woken by now is not waited for: it finds no job.
    std::unique_lock held(h.lock);
    h.job = nullptr;
    h.idle.wait(held, [&] { return h.working == 0; });
}

}  // namespace lmpipe
