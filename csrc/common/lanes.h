// Numbers side by side in a vector register, for the loops that gcc does not vectorise as meant.
#pragma once

namespace fastcl {

template <class T, int WIDTH>
struct Lanes {
#ifdef __GNUC__
  typedef T Vector __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
#else
  struct Vector {  // the same arithmetic for compilers without vector types
    T x[WIDTH];
    friend Vector operator*(Vector a, const Vector& b) {
      for (int i = 0; i < WIDTH; ++i) a.x[i] *= b.x[i];
      return a;
    }
    friend Vector operator-(Vector a, const Vector& b) {
      for (int i = 0; i < WIDTH; ++i) a.x[i] -= b.x[i];
      return a;
    }
    friend Vector operator-(Vector a, T b) {
      for (int i = 0; i < WIDTH; ++i) a.x[i] -= b;
      return a;
    }
    friend Vector operator*(Vector a, T b) {
      for (int i = 0; i < WIDTH; ++i) a.x[i] *= b;
      return a;
    }
    Vector& operator+=(const Vector& b) {
      for (int i = 0; i < WIDTH; ++i) x[i] += b.x[i];
      return *this;
    }
    Vector operator-() const {
      Vector a;
      for (int i = 0; i < WIDTH; ++i) a.x[i] = -x[i];
      return a;
    }
  };
#endif
};

}  // namespace fastcl
