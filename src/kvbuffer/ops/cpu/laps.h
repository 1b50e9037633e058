// What the operators take that run one after the other in one call: measured always, since nobody could from outside.
#pragma once
#include <chrono>

namespace kvb {

class Laps {
 public:
  // `seconds` is written, an element per lap.
  explicit Laps(double* seconds) : seconds_(seconds), last_(Clock::now()) {}

  void end() {
    const auto now = Clock::now();
    *seconds_++ = std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* seconds_;
  Clock::time_point last_;
};

}  // namespace kvb
