// A few threads that copy together. It knows nothing of what a piece of work is.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>

namespace lmpipe {

// Work cut into pieces, which threads claim one by one: a thread that the kernel takes off its core holds one piece up,
// not a share of the whole.
struct Job {
    uint64_t pieces = 0;
    std::atomic<uint64_t> next{0};

    virtual void piece(uint64_t index) noexcept = 0;

   protected:
    ~Job() = default;
};

// `threads` includes the caller of run(): with 1 there is no other. The helpers start at the first job that wants them
// and sleep between jobs. Jobs from several callers take turns.
class Crew {
   public:
    explicit Crew(unsigned threads) : threads_(threads) {}
    ~Crew();
    Crew(const Crew &) = delete;
    Crew &operator=(const Crew &) = delete;

    unsigned threads() const { return threads_; }

    // A forked child inherits neither the helpers nor sane locks: it gets new ones. Call before run(), one thread at a time
    // (that is, with the interpreter lock held).
    void notice_fork();
    // Returns when all pieces are done and every thread's stores are fenced. Call without the interpreter lock.
    void run(Job &job);

   private:
    struct Helpers;

    unsigned threads_;
    pid_t pid_ = 0;
    Helpers *helpers_ = nullptr;
};

}  // namespace lmpipe
